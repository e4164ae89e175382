"""Is an explanation faithful to its model? The papers' protocols on any data set and model."""
