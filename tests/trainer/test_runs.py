from trainer.runs import read_metrics


def test_a_log_cut_short_by_a_crash_is_read_up_to_there(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"update": 1}\n{"update": 2}\n{"upd')
    assert [record["update"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
