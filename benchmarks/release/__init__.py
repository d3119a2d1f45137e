"""Does the wheel install and run, and what comes with it?"""
