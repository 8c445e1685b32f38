"""The cheap job: trains, evaluates and reports on a student that reads nothing but a feature cache."""
