"""Names for vms that were given none: adjective-noun, as an innkeeper would call a guest."""

from __future__ import annotations

import random
from collections.abc import Callable

_ADJECTIVES = """
amber ample azure balmy blithe bold brave breezy bright brisk calm candid cheery chipper civil clever cosy crisp
curious dapper dawning deft dusky eager early earnest easy fabled fair fleet fond frank fresh gallant gentle glad
golden hale happy hardy hasty hearty honest humble jaunty jolly jovial keen kind lively loyal lucky lunar mellow
merry mild misty modest nimble noble patient placid plucky polite proud quick quiet rapid ready restful rosy rustic
sandy serene silver sleepy snug sober solar spry steady sturdy sunny swift tidy tranquil trusty upbeat vivid warm
wandering wary whimsical wise witty zesty
"""
_NOUNS = """
acrobat almond anchor apricot arch badger barge basil beacon bell birch bishop bobcat bridge brook camel canoe
canyon caravan cedar cellar chapel cherry cinder clover comet coral courier crane cricket curlew dahlia delta dove
drifter dune eagle ember falcon fern ferry finch fjord fox garnet gecko glade grove gull hamlet harbor hazel heron
hollow ibis inlet iris island ivy jasmine juniper kestrel lagoon lantern lark laurel lemon linden lodge lynx magpie
maple marlin meadow mesa mill minstrel mole moth nomad oak oasis olive orchard osprey otter peach pebble pilgrim
pine plover poppy porter quail quince raven reef ridge robin rover sage sailor sparrow spruce stork stranger summit
swallow tavern thistle trader trail traveler tulip valley violet voyager walnut willow wren
"""


def generate(taken: Callable[[str], bool]) -> str:
    """A free name. ``taken`` tells of a name whether a vm has it."""
    pick = random.SystemRandom()
    adjectives, nouns = _ADJECTIVES.split(), _NOUNS.split()
    for _ in range(20):
        name = f"{pick.choice(adjectives)}-{pick.choice(nouns)}"
        if not taken(name):
            return name
    while True:
        name = f"{pick.choice(adjectives)}-{pick.choice(nouns)}-{pick.randrange(1_000_000)}"
        if not taken(name):
            return name
