"""Detectors of other libraries on the ops of ``ssd_ext``: ``ssd_ext.integrations.torchvision``."""
