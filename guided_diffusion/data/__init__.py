"""Images and what belongs to them: sources, decoding, crops, labels, masks, conditioning images, the cache.

Images are read in sources.py, labels in labels.py; the stream of batches is in ../image_datasets.py.
"""
