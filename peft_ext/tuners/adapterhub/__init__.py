"""What AdapterHub's methods are in this library, and the other way round, by the keys of the checkpoints."""
