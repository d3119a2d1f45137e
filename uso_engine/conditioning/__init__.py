"""What a request gives besides noise: prompt embeddings, style tokens and content latents, and the caches that keep them."""
