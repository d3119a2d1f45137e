"""How long does a whole request take here, and by the other ways that a user has?"""
