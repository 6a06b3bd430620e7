"""Plan and shards: from a data set to committed records. No Ray in here."""
