from image_folders import image_folder  # noqa: F401
