"""The routes of `/v1`: REST over the same records, validation and job types as the RunPod surface."""
