"""Images: class folders, the bundled digits, preprocessing, augmentation."""
