"""Training HE-friendly models: distillation with a range penalty, calibration, and the recipe that chains them."""
