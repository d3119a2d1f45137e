"""Words that uso-tiny's prompts are made of; all of it written for this project."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


OBJECTS = _words(
    "mushroom fish house star cup tree flower boat bird cat dog car apple cake lamp chair book clock key hat shoe "
    "umbrella kite balloon rocket train bus bicycle castle tower bridge tent guitar drum bell candle teapot bottle vase "
    "robot snowman butterfly bee snail turtle rabbit bear fox owl duck whale crab leaf cactus pear cherry lemon carrot "
    "pumpkin heart moon cloud sun diamond crown sword shield camera phone bag ball toy doll teddy cookie bread cheese egg "
    "pizza burger mug jar basket sailboat teacup"
)
PLACES = _words(
    "beach forest garden desert city street park mountain valley river lake sea ocean island meadow field farm village "
    "harbour harbor kitchen room table shelf window wall floor grass snow sand sky water hill cave road bridge market "
    "museum library school station stage studio space jungle swamp cliff waterfall rooftop balcony bedroom office cafe "
    "bakery workshop attic hills mountains waves trees buildings clouds sunshine"
)
STYLES = _words(
    "flat striped dotted gradient ink outline night pastel watercolor watercolour oil pencil charcoal crayon chalk "
    "cartoon anime comic pixel mosaic stained glass woodcut linocut engraving etching poster vintage retro neon cyberpunk "
    "steampunk futuristic minimalist abstract cubist impressionist surreal realistic photographic cinematic clay felt "
    "paper origami embroidery knitted porcelain marble bronze wooden plastic metallic glossy matte grainy hatched "
    "crosshatched stippled sketchy geometric isometric psychedelic gothic baroque nouveau deco bauhaus ukiyo-e graffiti "
    "stencil collage silhouette monochrome sepia drawn art stripes dots hatching blueprint sunset colours model"
)
COLORS = _words(
    "red orange yellow green blue purple pink brown black white grey gray gold silver turquoise teal cyan magenta violet "
    "indigo crimson scarlet maroon olive lime mint cream beige ivory navy lavender coral peach amber rose"
)
ADJECTIVES = _words(
    "small large big little tiny huge old new young bright dark light pale soft hard warm cold hot wet dry clean dirty "
    "smooth rough shiny dull round square tall short long wide narrow thick thin deep shallow high low open closed full "
    "empty heavy quiet loud fast slow happy sad angry calm wild gentle strong weak simple complex detailed beautiful "
    "pretty ugly cute strange funny serious lonely busy peaceful mysterious magical ancient modern rustic elegant "
    "delicate bold vivid muted colorful colourful dramatic dreamy cozy foggy misty rainy snowy sunny cloudy stormy windy "
    "golden glowing floating flying sleeping standing sitting running walking smiling giant fluffy spotted curved bent "
    "broken fresh ripe sweet plain rolling alone"
)
NOUNS = _words(
    "picture image photo photograph painting drawing illustration sketch portrait scene view landscape background "
    "foreground subject object person man woman child boy girl people face hand hands eye eyes hair head body arm leg "
    "foot clothes dress coat shirt animal plant stone rock wood metal glass fire smoke steam rain wind storm light shadow "
    "reflection color colour shape line pattern texture style mood detail lighting composition perspective angle frame "
    "border center centre corner edge side top bottom left right middle front back distance day night morning evening "
    "afternoon sunset sunrise dawn dusk summer winter spring autumn year time world life story dream song music dance "
    "game sport food drink tea coffee fruit table desk bed door roof garden letter word sign logo text number name king "
    "queen knight wizard witch dragon monster ghost angel pirate astronaut soldier doctor teacher farmer artist friend "
    "family mother father baby crowd machine computer engine wheel ship plane truck"
)
VERBS = _words(
    "stands sits lies hangs floats flies swims walks runs jumps sleeps looks watches holds carries wears shows makes "
    "takes gives eats drinks reads writes plays sings dances smiles laughs grows shines glows burns falls rises moves "
    "turns opens closes"
)
INSTRUCTIONS = _words(
    "show make draw paint render create give put place add remove change turn transform convert keep preserve use apply "
    "replace imagine design generate depict portray"
)
FUNCTION_WORDS = _words(
    "a an the this that these those it its he she they we you I his her their our your my me him them us and or but not "
    "no with without in on at by for from to of into onto over under above below behind before after between beside near "
    "next around through across against among inside outside up down out off as like is are was were be been being has "
    "have had do does did can could will would should may might must very more most less least much many some any all "
    "each every both few other another same such only just also too so then than there here where when while who what "
    "which how why if because one two three four five six seven eight nine ten first second third last"
)
PREPOSITIONS = (
    "in",
    "on",
    "at",
    "by",
    "near",
    "behind",
    "under",
    "above",
    "beside",
    "next to",
    "in front of",
    "inside",
    "over",
)
LETTERS = "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝßàáâãäåæçèéêëìíîïñòóôõöøùúûüýÿŒœŠšŽž"
PUNCTUATION = "–—‘’“”…·•°€£×"
