"""Serving: tables of the HTTP documentation, and loads that are put on a server."""
