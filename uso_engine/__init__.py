"""uso_engine: GPU inference for USO image generation."""
