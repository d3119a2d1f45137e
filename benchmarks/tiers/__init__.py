"""What does a precision tier cost in accuracy, and what does it bring?"""
