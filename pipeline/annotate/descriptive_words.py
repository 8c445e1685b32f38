"""Words that a description may use although class names use them too: what can be seen, and words of grammar.

American Crow, Red-winged Blackbird and Audi TT Coupe are named with words like these; alone they name no class.
"""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COLOURS = _words(
    "amber ash ashy auburn azure bay beige black blond blonde blue blueish bluish brindle bronze brown brownish buff "
    "buffy burgundy cerulean chestnut chocolate cinnamon cobalt copper cream creamy crimson cyan dark dusky ebony "
    "emerald fawn ferruginous fulvous glaucous gold golden gray grayish green greenish grey greyish indigo ivory "
    "khaki lavender lemon light lilac maroon mauve metallic navy ochre olive olivaceous orange pale peach pearl pink "
    "pinkish purple red reddish rose rosy ruby ruddy rufous russet rust rusty sable salmon sandy sapphire scarlet "
    "sepia silver silvery slate slaty snowy sooty tan tawny teal turquoise ultramarine vermilion violet white whitish "
    "yellow yellowish"
)
_SIZES_AND_SHAPES = _words(
    "big bulky compact curved deep dwarf flat giant great greater heavy high huge large least lesser little long low "
    "medium mid miniature narrow pointed round rounded short slender slim small square squat standard straight stocky "
    "tall thick thin tiny wide boat cup fork forked scissor spoon wedge"
)
_PARTS = _words(
    "back beak belly bill body breast brow cap cheek chest chin collar crest crown ear eye face feather flank foot "
    "forehead front fur hair head hood leg mane mask muzzle nape neck nose paw plumage rear rump shoulder side skin "
    "tail throat toe tooth whisker wing door grille headlight hood petal leaf roof spoiler stem wheel window"
)
_HAVING_PARTS = _words(
    "bellied bodied breasted browed capped cheeked collared crested crowned backed billed eared eyed faced feathered "
    "feet flanked footed fronted furred haired headed hooded legged lored masked naped necked nosed rumped shouldered "
    "sided tailed teeth throated toed vented winged wheeled doored"
)
_PATTERNS = _words(
    "banded bar barred bearded belted bibbed bordered bright brushed checkered coated colored coloured crossed curly "
    "dotted edged fanned fluffy fuzzy glossy horned iridescent laced lined marbled matte mottled painted patched pied "
    "plain plumed ringed rough scaled scaly shaggy shiny smooth solid speckled spectacled spiny spot spotted striped "
    "streaked stripe tailless tufted varied variegated wavy wire wiry"
)
_PLACES_AND_TIMES = _words(
    "america american bank barn cliff common desert east eastern evening field forest garden ground house island "
    "lake land marsh meadow mountain north northern ocean pine pond prairie river rock sand sea seaside shore south "
    "southern summer surf swamp tree water west western winter wood world"
)
_SEX_AND_AGE = _words("adult breeding female immature juvenile male mature morph nonbreeding old phase young")
# What a vehicle's body looks like is a description of it, as a bird's colours are.
_VEHICLE_BODIES = _words(
    "cab cargo car convertible coupe crew door extended hatchback minivan pickup regular roadster sedan sport suv "
    "truck utility van vehicle wagon"
)
_KINDS = _words(
    "animal brand breed class edition family general genus hybrid kind make model passenger plant series species type "
    "variety"
)
GRAMMAR = _words(
    "a about above across against all along also am among an and are around as at be been behind below beneath beside "
    "between both but by can does down each few for from had has have having he her his i if in into is it its many "
    "may more most near no not of off on one onto or other our out over own poor she so some such than that the their "
    "them then there these they this those through to toward towards two under up upon was we were which while who "
    "whose will with within without you your features featuring shows showing stands standing sits sitting perched "
    "perches appears"
)

DESCRIPTIVE = (
    _COLOURS | _SIZES_AND_SHAPES | _PARTS | _HAVING_PARTS | _PATTERNS | _PLACES_AND_TIMES | _SEX_AND_AGE
    | _VEHICLE_BODIES | _KINDS | GRAMMAR
)  # fmt: skip
