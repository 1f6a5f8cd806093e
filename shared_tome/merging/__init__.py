"""What a layer's call merges: plans of groups, and the call that makes them."""
