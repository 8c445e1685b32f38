"""`make bench`: every benchmark, one after the other."""

from benchmarks import ablation, compression, reading

if __name__ == "__main__":
    reading.main([])
    compression.main([])
    ablation.main([])
