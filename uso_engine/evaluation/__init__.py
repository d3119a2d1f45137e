"""Pictures drawn by code and the ruler that judges the engine on them."""
