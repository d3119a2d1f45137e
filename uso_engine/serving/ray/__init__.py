"""The server on Ray Serve: an ingress that speaks HTTP, engines as replicas, requests routed by work and by what is cached.

`policy`, `scaling`, `demand`, `report` and `messages` know nothing of Ray and read no clock: the simulator of
benchmarks/scaling runs the same code. `router`, `replica`, `ingress` and `application` put it on Ray.
"""
