"""Does everything fit in the memory that it is given?"""
