"""What the network is: shapes, storage, adapters."""
