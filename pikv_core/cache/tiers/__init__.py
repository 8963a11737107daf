"""Memory behind the device: host, disk and a simulated CXL memory hold the pages that it has no room for."""
