"""What configurations will need and cost, before anything is loaded: points, figures, and what fits on a card."""
