"""The student and the heads it is trained with."""
