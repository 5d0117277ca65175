"""Labelled images from named data sets, image folders and webdataset shards, and batches of them."""

from flowaug.data.images import ImageDataset, stack_images
from flowaug.data.load import DATASETS, load_dataset
from flowaug.data.loaders import batches, create_loader

__all__ = ["DATASETS", "ImageDataset", "batches", "create_loader", "load_dataset", "stack_images"]
