"""What a learner meets around the model: setting up a notebook, and later the exercises."""
