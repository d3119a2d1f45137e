"""Matrix products: of floats, and of weights kept in 8 or 4 bits."""
