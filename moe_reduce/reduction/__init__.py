"""Pure transforms from a model to a smaller model, and the scores that choose what to keep."""
