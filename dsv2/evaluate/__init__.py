"""Measuring what a trained model can do."""
