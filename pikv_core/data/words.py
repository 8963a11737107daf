"""Words for the needles in real text: animals are the keys; colours, woods, stones and spices the values.

They are rare in prose, and none begins another, so that each can be one token wherever it stands.
"""

_ANIMALS = """
albatross alpaca anaconda antelope armadillo axolotl baboon badger barracuda beagle beetle bison bobcat
buffalo bumblebee bunting buzzard camel capybara caracal caribou cheetah chinchilla chipmunk cicada
cobra condor cormorant cougar coyote cricket cuckoo curlew dingo dolphin donkey dormouse dragonfly egret
falcon ferret finch firefly flamingo gazelle gecko gerbil gibbon giraffe gorilla grackle grouse hamster
hedgehog heron hornet hyena iguana impala jackal jaguar kestrel kingfisher koala kookaburra lemur
leopard lizard llama lobster locust lynx macaw magpie mallard mammoth manatee marmot marten meerkat
mongoose moose narwhal nightingale ocelot octopus opossum orangutan osprey ostrich otter panther
parakeet partridge peacock pelican penguin pheasant porcupine puffin puma quail rabbit raccoon reindeer
salamander salmon scorpion seahorse skunk sparrow squirrel starling stingray swallow tamarin tapir
tarantula tortoise toucan turkey vulture wallaby walrus weasel wombat woodpecker zebra
"""

_COLOURS = """
almond amber apricot auburn avocado bamboo beige bronze burgundy cashew cedar charcoal cherry cinnamon
clover cobalt coconut copper coral crimson cypress ebony emerald ginger granite hazel indigo ivory
jasmine juniper khaki lavender lemon lilac magenta mahogany mango maple marble maroon mustard nutmeg
onyx orchid papaya pearl peppermint pewter pistachio quartz raspberry rosemary ruby saffron sapphire
scarlet silver tangerine turquoise vanilla velvet violet walnut willow
"""

KEYS = _ANIMALS.split()
VALUES = _COLOURS.split()
