"""What a user can see of it: records, reports, and pictures of the groups."""
