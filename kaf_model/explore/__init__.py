"""What a network sees in a volume: features, attention, matches, look-alikes, and how steady they are.

`explorer` holds the network, `views` what it makes of the slices of a volume; everything else reads a view.
"""
