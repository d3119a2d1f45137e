"""Two campaigns of measurements for a GPU that is there for minutes: parts with a process and a time limit of their own."""
