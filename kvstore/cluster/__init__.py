"""The local cluster: engine replicas that speak OpenAI's API, a router before them, and what starts them all."""
