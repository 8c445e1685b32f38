"""`make bench`: every benchmark, one after the other."""

from benchmarks import ablation, reading

if __name__ == "__main__":
    reading.main([])
    ablation.main([])
