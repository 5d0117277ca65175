"""webdataset shards: finding and reading them, as a data set, and as batches."""
