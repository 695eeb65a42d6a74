"""Which sample stands where in a run: filters, buckets, mixtures, the plan."""
