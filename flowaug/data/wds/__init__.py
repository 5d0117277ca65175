"""webdataset shards: which there are, what they hold, as a data set, its batches."""
