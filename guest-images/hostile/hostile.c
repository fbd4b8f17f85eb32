/*
 * hostile: a bare-metal guest that abuses its devices from ring 3, for ever. README.md names the attacks. It starts as pulse does
 * (../pulse/entry.S); nothing that it prints is to be believed but that it still runs: a dot each round.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

#define COM1 0x3f8
#define COM1_LSR (COM1 + 5)
#define LSR_THR_EMPTY 0x20

#define WINDOWS 11
#define WINDOW(n) (0xd0000000UL + (n) * 0x1000UL)
#define MAGIC 0x74726976
#define MAX_QUEUES 3
#define QUEUE_SIZE 64

/* Registers of virtio-mmio, virtio 1.2 §4.2.2. */
enum {
	R_MAGIC = 0x000, R_DEVICE = 0x008, R_FEATURES = 0x010, R_FEATURES_SEL = 0x014, R_DRIVER = 0x020,
	R_DRIVER_SEL = 0x024, R_QUEUE_SEL = 0x030, R_QUEUE_MAX = 0x034, R_QUEUE_NUM = 0x038, R_QUEUE_READY = 0x044,
	R_NOTIFY = 0x050, R_ISR = 0x060, R_ACK = 0x064, R_STATUS = 0x070, R_DESC = 0x080, R_AVAIL = 0x090,
	R_USED = 0x0a0, R_CONFIG = 0x100,
};
enum { S_ACK = 1, S_DRIVER = 2, S_DRIVER_OK = 4, S_FEATURES_OK = 8, S_NEEDS_RESET = 64 };
enum { D_NEXT = 1, D_WRITE = 2, D_INDIRECT = 4 };
enum { ID_NET = 1, ID_BLOCK = 2, ID_RNG = 4, ID_VSOCK = 19 };

struct descriptor { u64 address; u32 len; u16 flags, next; };
struct ring {
	struct descriptor table[QUEUE_SIZE];
	u16 available_flags, available_index, available[QUEUE_SIZE + 1];
	u16 used_flags __attribute__((aligned(4)));
	u16 used_index;
	struct { u32 id, len; } used[QUEUE_SIZE];
	u16 published;
} __attribute__((aligned(4096)));

static struct ring rings[WINDOWS][MAX_QUEUES];
static u8 buffers[1 << 20] __attribute__((aligned(4096)));
static u64 memory_end, state = 0x9e3779b97f4a7c15UL;

void *memset(void *to, int byte, u64 len)
{
	for (u8 *p = to; len; len--)
		*p++ = byte;
	return to;
}

static u64 random(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static u64 below(u64 n)
{
	return random() % n;
}

static void out8(u32 port, u8 value)
{
	__asm__ volatile("outb %0, %w1" ::"a"(value), "d"(port));
}

static u8 in8(u32 port)
{
	u8 value;
	__asm__ volatile("inb %w1, %0" : "=a"(value) : "d"(port));
	return value;
}

static void put(char c)
{
	for (u32 tries = 0; tries < 10000 && !(in8(COM1_LSR) & LSR_THR_EMPTY); tries++)
		;
	out8(COM1, c);
}

static u32 get(u64 window, u32 reg)
{
	return *(volatile u32 *)(WINDOW(window) + reg);
}

static void set(u64 window, u32 reg, u32 value)
{
	*(volatile u32 *)(WINDOW(window) + reg) = value;
}

static void set64(u64 window, u32 reg, u64 value)
{
	set(window, reg, value);
	set(window, reg + 4, value >> 32);
}

/* ---- a driver, honest so far ---- */

static u32 device(u64 window)
{
	return get(window, R_MAGIC) == MAGIC ? get(window, R_DEVICE) : 0;
}

static void set_up_queue(u64 window, u64 queue, u64 size)
{
	struct ring *ring = &rings[window][queue];
	memset(ring, 0, sizeof(*ring));
	set(window, R_QUEUE_SEL, queue);
	set(window, R_QUEUE_NUM, size);
	set64(window, R_DESC, (u64)ring->table);
	set64(window, R_AVAIL, (u64)&ring->available_flags);
	set64(window, R_USED, (u64)&ring->used_flags);
	set(window, R_QUEUE_READY, 1);
}

static void start(u64 window)
{
	set(window, R_STATUS, 0);
	set(window, R_STATUS, S_ACK);
	set(window, R_STATUS, S_ACK | S_DRIVER);
	for (u32 half = 0; half < 2; half++) {
		set(window, R_FEATURES_SEL, half);
		set(window, R_DRIVER_SEL, half);
		set(window, R_DRIVER, get(window, R_FEATURES));
	}
	set(window, R_STATUS, S_ACK | S_DRIVER | S_FEATURES_OK);
	for (u64 queue = 0; queue < MAX_QUEUES; queue++)
		set_up_queue(window, queue, QUEUE_SIZE);
	set(window, R_STATUS, S_ACK | S_DRIVER | S_FEATURES_OK | S_DRIVER_OK);
}

static void restart_if_broken(u64 window)
{
	u32 status = get(window, R_STATUS);
	if (status & S_NEEDS_RESET || !(status & S_DRIVER_OK))
		start(window);
}

static void publish(u64 window, u64 queue, u16 head)
{
	struct ring *ring = &rings[window][queue];
	ring->available[ring->published % QUEUE_SIZE] = head;
	__atomic_store_n(&ring->available_index, ++ring->published, __ATOMIC_RELEASE);
}

static void notify(u64 window, u64 queue)
{
	set(window, R_NOTIFY, queue);
}

static void describe(u64 window, u64 queue, u16 index, void *address, u32 len, u16 flags)
{
	struct descriptor *d = &rings[window][queue].table[index];
	d->address = (u64)address, d->len = len, d->flags = flags, d->next = index + 1;
}

/* One request of the block device: header, data, status. */
static void block_request(u64 window, u32 kind, u64 sector, void *data, u32 len, int device_writes)
{
	u8 *header = buffers, *status = buffers + 64;
	*(u32 *)header = kind, *(u32 *)(header + 4) = 0, *(u64 *)(header + 8) = sector;
	describe(window, 0, 0, header, 16, D_NEXT);
	describe(window, 0, 1, data, len, D_NEXT | (device_writes ? D_WRITE : 0));
	describe(window, 0, 2, status, 1, D_WRITE);
	publish(window, 0, 0);
	notify(window, 0);
}

/* ---- attacks: each call is one round ---- */

static u64 any_address(void)
{
	switch (below(6)) {
	case 0: return random();
	case 1: return memory_end - below(64);
	case 2: return memory_end + below(1 << 30);
	case 3: return WINDOW(below(WINDOWS)) + below(0x200);
	case 4: return ~0UL - below(4096);
	default: return (u64)buffers + below(sizeof(buffers));
	}
}

static void descriptors(u64 window)
{
	restart_if_broken(window);
	u64 queue = below(MAX_QUEUES);
	struct ring *ring = &rings[window][queue];
	for (u64 n = 0; n < 16; n++) {
		struct descriptor *d = &ring->table[below(QUEUE_SIZE)];
		d->address = any_address();
		d->len = below(3) ? below(1 << 17) : random();
		d->flags = below(3) ? below(4) : random();
		d->next = below(8) ? below(QUEUE_SIZE) : random();
	}
	for (u64 n = below(8); n; n--)
		publish(window, queue, below(16) ? below(QUEUE_SIZE) : random());
	if (!below(32))
		ring->available_index = random();
	notify(window, queue);
}

static void loops(u64 window)
{
	restart_if_broken(window);
	u64 queue = below(MAX_QUEUES);
	for (u64 n = 0; n < QUEUE_SIZE; n++)
		describe(window, queue, n, buffers, 4096, D_NEXT | (below(2) ? D_WRITE : 0));
	rings[window][queue].table[QUEUE_SIZE - 1].next = 0;
	if (below(2)) {
		/* An indirect table that is its own first entry. */
		struct descriptor *d = &rings[window][queue].table[0];
		d->address = (u64)d, d->len = 16 * QUEUE_SIZE, d->flags = D_INDIRECT;
	}
	publish(window, queue, 0);
	notify(window, queue);
}

static void move_rings(u64 window)
{
	restart_if_broken(window);
	u64 queue = below(MAX_QUEUES);
	for (u64 n = 0; n < 8; n++) {
		describe(window, queue, n, buffers + 4096 * n, 4096, below(2) ? D_WRITE : 0);
		publish(window, queue, n);
	}
	notify(window, queue);
	set(window, R_QUEUE_SEL, queue);
	if (below(2))
		set(window, R_QUEUE_READY, 0);
	set(window, R_QUEUE_NUM, below(4) ? 1UL << below(10) : random());
	set64(window, below(2) ? R_DESC : below(2) ? R_AVAIL : R_USED, below(2) ? any_address() & ~15UL : any_address());
	set(window, R_QUEUE_READY, 1);
	notify(window, queue);
}

static void registers(u64 window)
{
	u64 at = WINDOW(window) + (below(2) ? below(0x200) & ~3UL : below(0x1000));
	u32 value = below(2) ? below(16) : random();
	switch (below(8)) {
	case 0: (void)*(volatile u8 *)at; break;
	case 1: (void)*(volatile u16 *)at; break;
	case 2: (void)*(volatile u32 *)at; break;
	case 3: (void)*(volatile u64 *)at; break;
	case 4: *(volatile u8 *)at = value; break;
	case 5: *(volatile u16 *)at = value; break;
	case 6: *(volatile u32 *)at = value; break;
	default: *(volatile u64 *)at = random(); break;
	}
}

static void doorbells(u64 window)
{
	for (u64 n = 0; n < 256; n++)
		notify(window, n % (MAX_QUEUES + 1));
}

static void resets(u64 window)
{
	start(window);
	for (u64 queue = 0; queue < MAX_QUEUES; queue++)
		for (u64 n = 0; n < 32; n++) {
			describe(window, queue, n, buffers + 8192 * n, 8192, below(2) ? D_WRITE : 0);
			publish(window, queue, n);
		}
	if (device(window) == ID_BLOCK)
		block_request(window, below(2), 0, buffers + 4096, 1 << 18, 1);
	for (u64 queue = 0; queue < MAX_QUEUES; queue++)
		notify(window, queue);
	set(window, R_STATUS, below(2) ? 0 : random());
}

static void discards(u64 window)
{
	static u64 segment[2];
	if (device(window) != ID_BLOCK)
		return;
	restart_if_broken(window);
	u64 sectors = *(volatile u32 *)(WINDOW(window) + R_CONFIG);
	if (!sectors)
		return;
	segment[0] = below(4) ? 0 : random();
	segment[1] = below(4) ? sectors : random();
	if (below(2))	/* something to discard */
		block_request(window, 1, below(sectors), buffers + 4096, 1 << 18, 0);
	block_request(window, below(2) ? 11 : 13, 0, segment, 16, 0);
}

static void vsock_flood(u64 window)
{
	if (device(window) != ID_VSOCK)
		return;
	restart_if_broken(window);
	for (u64 n = 0; n < 32; n++) {
		u8 *packet = buffers + n * 256;
		*(u64 *)packet = below(64) ? *(volatile u32 *)(WINDOW(window) + R_CONFIG) : random();
		*(u64 *)(packet + 8) = 2;
		*(u32 *)(packet + 16) = random();
		*(u32 *)(packet + 20) = below(4);
		*(u32 *)(packet + 24) = below(8) ? 0 : random();
		*(u16 *)(packet + 28) = 1;
		*(u16 *)(packet + 30) = below(3) ? 1 : below(9);
		*(u32 *)(packet + 32) = below(4);
		*(u32 *)(packet + 36) = random();
		*(u32 *)(packet + 40) = random();
		describe(window, 1, n, packet, 256, 0);
		publish(window, 1, n);
		describe(window, 0, n, buffers + 0x40000 + n * 4096, 4096, D_WRITE);
		publish(window, 0, n);
	}
	notify(window, 0);
	notify(window, 1);
}

static void frames(u64 window)
{
	if (device(window) != ID_NET)
		return;
	restart_if_broken(window);
	for (u64 n = 0; n < 32; n++) {
		u8 *frame = buffers + n * 0x4000;
		for (u64 byte = 0; byte < 16; byte += 8)
			*(u64 *)(frame + byte) = below(2) ? 0 : random();
		frame[0] &= 1, frame[1] &= 1;
		describe(window, 1, n, frame, 12 + below(0x3ff0), 0);
		publish(window, 1, n);
	}
	notify(window, 1);
}

static void console(void)
{
	for (u32 n = 0; n < 4096; n++)
		out8(COM1, ' ' + n % 95);
}

static void exits(void)
{
	for (u32 n = 0; n < 4096; n++) {
		u32 port = below(0x400);
		if (port >= 0x60 && port < 0x65)	/* the reset line is behind these */
			continue;
		if (below(2))
			in8(port);
		else if (port < COM1 || port >= COM1 + 8)
			out8(port, random());
	}
}

static const struct { const char *name; void (*on)(u64 window); void (*alone)(void); } attacks[] = {
	{ "descriptors", descriptors, 0 }, { "loops", loops, 0 },     { "rings", move_rings, 0 },
	{ "registers", registers, 0 },	   { "doorbells", doorbells, 0 }, { "resets", resets, 0 },
	{ "discards", discards, 0 },	   { "vsock", vsock_flood, 0 }, { "frames", frames, 0 },
	{ "console", 0, console },	   { "exits", 0, exits },
};
#define ATTACKS (sizeof(attacks) / sizeof(attacks[0]))

static void attack(u64 which)
{
	if (attacks[which].alone) {
		attacks[which].alone();
		return;
	}
	for (u64 window = 0; window < WINDOWS; window++)
		if (device(window))
			attacks[which].on(window);
}

/* The number of the attack whose name the command line gives after "attack="; ATTACKS for all of them in turn. */
static u64 chosen(const char *line)
{
	const char *key = "attack=";
	for (; line && *line; line++) {
		u64 n = 0;
		while (key[n] && line[n] == key[n])
			n++;
		if (key[n])
			continue;
		for (u64 which = 0; which < ATTACKS; which++) {
			const char *name = attacks[which].name, *given = line + n;
			while (*name && *name == *given)
				name++, given++;
			if (!*name)
				return which;
		}
	}
	return ATTACKS;
}

void ap_main(u64 cpu)
{
	(void)cpu;
	for (;;)
		__asm__ volatile("pause");
}

void pulse_main(const char *command_line)
{
	u64 which = chosen(command_line);
	memory_end = 64UL << 20;
	for (u64 window = 0; window < WINDOWS; window++)
		if (device(window))
			start(window);
	put('R');
	put('\n');
	for (u64 round = 0;; round++) {
		attack(which < ATTACKS ? which : below(ATTACKS));
		if (round % 64 == 0)
			put('.');
	}
}
