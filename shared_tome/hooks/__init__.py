"""Where a model is met: module hooks, and whether an attention may be touched."""
