"""Data: band records, device-side views and the data modules that read files.

``data.bands`` and ``data.views`` need torch only. TorchGeo and rasterio are imported by the modules that read files
with them, and only once they are used.
"""
