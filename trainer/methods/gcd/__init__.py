"""DiT-Distill: generative curriculum distillation with the GIM, DRC and CAL."""
