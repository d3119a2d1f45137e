"""What does an option that saves work cost in quality, and does it beat taking fewer steps?"""
