"""Proof that both jobs work on this machine's GPU, at real size and without downloads: `make gpu-check`.

Without a GPU the same checks run at the demo teacher's size on the CPU, in less than a minute.
"""
