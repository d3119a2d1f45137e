"""How far are the engine's answers from the authors', and is what the embedded model makes good?"""
