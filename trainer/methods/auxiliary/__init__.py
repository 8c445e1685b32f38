"""The teacher's features read at test time too: rows ② and ③ of the paper's ablation."""
