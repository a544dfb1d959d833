"""The replay buffer: its ring of slots, the frames on a device, its rows on disk, and the memory it takes."""
