"""What does a denoising step cost, what should it cost, and what does each optimisation bring?"""
