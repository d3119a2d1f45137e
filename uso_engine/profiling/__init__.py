"""What a request's time goes to, beside the least that it could take."""
