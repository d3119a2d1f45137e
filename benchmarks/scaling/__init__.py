"""Many replicas, simulated: the router's and the autoscaler's own code over the load generator's traces."""
